/* Hits: a call like an earlier one, from its arguments to its launches in one step of C.

   It does what torch_ops, dispatch and plans do in Python for such a call; that stays, serves where this cannot be compiled, and
   is what tests compare this with. Nothing here belongs to torch or CUDA at compile time: torch is asked by functions that Python
   sees, and CUDA's driver by the address of cuLaunchKernelEx. Whatever is not exactly like an earlier call is given back
   (NotImplemented) with nothing done. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MOST_VALUES = 64, MOST_PARAMETERS = 128, MOST_BYTES = 4096, MOST_KNOWN = 16, MAP_BYTES = 128, ALIGNMENT = 16 };
enum { MOST_ROOMS = 16, MOST_ROOM_BYTES = 32 << 20 };

/* CUlaunchAttribute and CUlaunchConfig of cuda.h. */
typedef struct {
  unsigned id, pad, value[16];
} Attribute;

typedef struct {
  unsigned grid[3], block[3], smem;
  void *stream;
  Attribute *attributes;
  unsigned count;
} Config;

_Static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "as cuda.h lays them out on 64 bits");
enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

typedef int (*Launcher)(const Config *, void *function, void **parameters, void **extra);
typedef int (*Capturing)(void *stream, int *status);

typedef struct {
  unsigned offset, slot; /* into the parameters' bytes; of the address that goes there */
  uint64_t beyond;       /* bytes behind that address */
} Pointer;

typedef struct {
  unsigned offset, view;
} Map;

typedef struct {
  void *function;
  Config config;
  Attribute attributes[2];
  unsigned size, parameters, pointers, maps;
  unsigned offsets[MOST_PARAMETERS];
  Pointer *pointer;
  Map *map;
  unsigned char *bytes; /* of the parameters, addresses and maps left out */
} Launch;

typedef struct {
  PyObject *function, *args;
  int addressed;
} Make;

typedef struct {
  unsigned place;
  PyObject *known, *encode; /* address -> bytes of the map, and what finds those that are not known */
} View;

typedef struct {
  PyObject_HEAD
  PyObject *ticks, *device, *current_device, *stream_of, *address_of, *recover, *keep;
  Launcher launcher;
  Capturing capturing;
  uint64_t room_bytes;
  unsigned given, makes, views, launches;
  Make *make, room;
  View *view;
  Launch *launch;
} Plan;

static PyTypeObject PlanType;

static void plan_dealloc(Plan *self) {
  for (unsigned i = 0; i < self->makes; i++) {
    Py_XDECREF(self->make[i].function);
    Py_XDECREF(self->make[i].args);
  }
  for (unsigned i = 0; i < self->views; i++) {
    Py_XDECREF(self->view[i].known);
    Py_XDECREF(self->view[i].encode);
  }
  for (unsigned i = 0; i < self->launches; i++) {
    PyMem_Free(self->launch[i].pointer);
    PyMem_Free(self->launch[i].map);
    PyMem_Free(self->launch[i].bytes);
  }
  PyMem_Free(self->make);
  PyMem_Free(self->view);
  PyMem_Free(self->launch);
  Py_XDECREF(self->room.function);
  Py_XDECREF(self->room.args);
  Py_XDECREF(self->ticks);
  Py_XDECREF(self->device);
  Py_XDECREF(self->current_device);
  Py_XDECREF(self->stream_of);
  Py_XDECREF(self->address_of);
  Py_XDECREF(self->recover);
  Py_XDECREF(self->keep);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static int refuse(const char *what) {
  PyErr_SetString(PyExc_ValueError, what);
  return -1;
}

/* Room for as many as a tuple holds, all zero. */
static void *row_of(PyObject *tuple, size_t size, unsigned *count) {
  Py_ssize_t length = PyTuple_GET_SIZE(tuple);
  void *row = PyMem_Calloc(length ? length : 1, size);
  if (!row) PyErr_NoMemory();
  *count = row ? (unsigned)length : 0;
  return row;
}

static int take_make(Make *make, PyObject *given) {
  if (!PyArg_ParseTuple(given, "OO!p", &make->function, &PyTuple_Type, &make->args, &make->addressed)) {
    make->function = make->args = NULL;
    return -1;
  }
  Py_INCREF(make->function);
  Py_INCREF(make->args);
  return 0;
}

static int take_view(View *view, PyObject *given, unsigned tensors) {
  if (!PyArg_ParseTuple(given, "IO!O", &view->place, &PyDict_Type, &view->known, &view->encode)) {
    view->known = view->encode = NULL;
    return -1;
  }
  Py_INCREF(view->known);
  Py_INCREF(view->encode);
  return view->place < tensors ? 0 : refuse("a view of no tensor");
}

static void take_attributes(Launch *launch, unsigned cluster, int overlaps) {
  Config *config = &launch->config;
  config->attributes = launch->attributes;
  if (cluster > 1) {
    Attribute *attribute = launch->attributes + config->count++;
    attribute->id = CLUSTER_DIMENSION;
    attribute->value[0] = cluster;
    attribute->value[1] = attribute->value[2] = 1;
  }
  if (overlaps) {
    Attribute *attribute = launch->attributes + config->count++;
    attribute->id = PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute->value[0] = 1;
  }
}

static int take_parameters(Launch *launch, PyObject *offsets, PyObject *pointers, PyObject *maps, unsigned slots, unsigned views) {
  launch->parameters = (unsigned)PyTuple_GET_SIZE(offsets);
  for (unsigned i = 0; i < launch->parameters; i++) {
    unsigned long offset = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(offsets, i));
    if (PyErr_Occurred()) return -1;
    if (offset >= launch->size) return refuse("a parameter beyond the others");
    launch->offsets[i] = (unsigned)offset;
  }
  launch->pointer = row_of(pointers, sizeof(Pointer), &launch->pointers);
  for (unsigned i = 0; i < launch->pointers; i++) {
    Pointer *pointer = launch->pointer + i;
    unsigned long long beyond;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(pointers, i), "IIK", &pointer->offset, &pointer->slot, &beyond)) return -1;
    pointer->beyond = beyond;
    if (pointer->offset + 8 > launch->size || pointer->slot >= slots) return refuse("an address of nothing, or beyond the others");
  }
  launch->map = row_of(maps, sizeof(Map), &launch->maps);
  for (unsigned i = 0; i < launch->maps; i++) {
    Map *map = launch->map + i;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(maps, i), "II", &map->offset, &map->view)) return -1;
    if (map->offset + MAP_BYTES > launch->size || map->view >= views) return refuse("a map of nothing, or beyond the others");
  }
  return launch->pointer && launch->map ? 0 : -1;
}

static int take_launch(Launch *launch, PyObject *given, unsigned slots, unsigned views) {
  unsigned long long function;
  unsigned threads, cluster, *grid = launch->config.grid;
  int overlaps;
  const char *bytes;
  Py_ssize_t size;
  PyObject *offsets, *pointers, *maps;
  if (!PyArg_ParseTuple(given, "K(III)IIIpy#O!O!O!", &function, grid, grid + 1, grid + 2, &threads, &launch->config.smem, &cluster,
                        &overlaps, &bytes, &size, &PyTuple_Type, &offsets, &PyTuple_Type, &pointers, &PyTuple_Type, &maps))
    return -1;
  if (size > MOST_BYTES || PyTuple_GET_SIZE(offsets) > MOST_PARAMETERS) return refuse("too many parameters");
  launch->function = (void *)(uintptr_t)function;
  launch->config.block[0] = threads;
  launch->config.block[1] = launch->config.block[2] = 1;
  launch->size = (unsigned)size;
  if (!(launch->bytes = PyMem_Malloc(size ? size : 1))) {
    PyErr_NoMemory();
    return -1;
  }
  memcpy(launch->bytes, bytes, size);
  take_attributes(launch, cluster, overlaps);
  return take_parameters(launch, offsets, pointers, maps, slots, views);
}

static int take_all(Plan *self, PyObject *makes, PyObject *room, PyObject *views, PyObject *launches) {
  if (self->given + PyTuple_GET_SIZE(makes) + 1 > MOST_VALUES) return refuse("too many tensors");
  if (!(self->make = row_of(makes, sizeof(Make), &self->makes))) return -1;
  for (unsigned i = 0; i < self->makes; i++)
    if (take_make(self->make + i, PyTuple_GET_ITEM(makes, i))) return -1;
  if (room != Py_None && take_make(&self->room, room)) return -1;
  if (!(self->view = row_of(views, sizeof(View), &self->views))) return -1;
  for (unsigned i = 0; i < self->views; i++)
    if (take_view(self->view + i, PyTuple_GET_ITEM(views, i), self->given)) return -1;
  if (!(self->launch = row_of(launches, sizeof(Launch), &self->launches))) return -1;
  unsigned total = 0;
  for (unsigned i = 0; i < self->launches; i++) {
    if (take_launch(self->launch + i, PyTuple_GET_ITEM(launches, i), self->given + self->makes + 1, self->views)) return -1;
    total += (self->launch[i].size + 63) / 64 * 64;
  }
  return total <= MOST_BYTES ? 0 : refuse("too many parameters");
}

/* Plan(launcher, capturing, ticks, device, current_device, stream_of, address_of, recover, keep, given, makes, room, room_bytes,
   views, launches): what hits.py makes of a plan; its words are explained there. */
static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
  unsigned long long launcher, capturing, room_bytes;
  unsigned given;
  PyObject *ticks, *device, *current_device, *stream_of, *address_of, *recover, *keep, *makes, *room, *views, *launches;
  if (!PyArg_ParseTuple(args, "KKOO!OOOOOIO!OKO!O!", &launcher, &capturing, &ticks, &PyLong_Type, &device, &current_device,
                        &stream_of, &address_of, &recover, &keep, &given, &PyTuple_Type, &makes, &room, &room_bytes, &PyTuple_Type,
                        &views, &PyTuple_Type, &launches))
    return NULL;
  Plan *self = (Plan *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->launcher = (Launcher)(uintptr_t)launcher;
  self->capturing = (Capturing)(uintptr_t)capturing;
  self->room_bytes = room_bytes;
  self->ticks = Py_NewRef(ticks);
  self->device = Py_NewRef(device);
  self->current_device = Py_NewRef(current_device);
  self->stream_of = Py_NewRef(stream_of);
  self->address_of = Py_NewRef(address_of);
  self->recover = Py_NewRef(recover);
  self->keep = Py_NewRef(keep);
  self->given = given;
  if (!PyIter_Check(ticks) ? refuse("a count without steps") : take_all(self, makes, room, views, launches)) Py_CLEAR(self);
  return (PyObject *)self;
}

/* Calls, of which a hit makes a dozen: what is written in C is called by its pointer, without Python's protocol in between. */
static PyObject *answer(PyObject *function) {
  if (PyCFunction_CheckExact(function) && PyCFunction_GET_FLAGS(function) == METH_NOARGS)
    return PyCFunction_GET_FUNCTION(function)(PyCFunction_GET_SELF(function), NULL);
  return PyObject_CallNoArgs(function);
}

static PyObject *applied(PyObject *function, PyObject *args) {
  if (PyCFunction_CheckExact(function) && PyCFunction_GET_FLAGS(function) == METH_VARARGS)
    return PyCFunction_GET_FUNCTION(function)(PyCFunction_GET_SELF(function), args);
  return PyObject_Call(function, args, NULL);
}

/* Of one value; a method of the value's very class may come as the class has it. */
static PyObject *asked(PyObject *function, PyObject *value) {
  if (Py_IS_TYPE(function, &PyMethodDescr_Type)) {
    PyMethodDef *method = ((PyMethodDescrObject *)function)->d_method;
    if (method->ml_flags == METH_NOARGS && PyObject_TypeCheck(value, PyDescr_TYPE(function))) return method->ml_meth(value, NULL);
  }
  return PyObject_Vectorcall(function, &value, 1, NULL);
}

/* 0, or -1 with an error set. */
static int address(PyObject *address_of, PyObject *tensor, uint64_t *found) {
  PyObject *number = asked(address_of, tensor);
  if (!number) return -1;
  *found = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  return *found == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *made(const Plan *self, const Make *make, uint64_t *slot) {
  PyObject *tensor = applied(make->function, make->args);
  if (tensor && make->addressed && address(self->address_of, tensor, slot)) Py_CLEAR(tensor);
  return tensor;
}

/* The map of a view at an address, a new reference. */
static PyObject *map_at(const View *view, uint64_t address) {
  PyObject *number = PyLong_FromUnsignedLongLong(address);
  if (!number) return NULL;
  PyObject *map = PyDict_GetItemWithError(view->known, number);
  if (map)
    Py_INCREF(map);
  else if (!PyErr_Occurred())
    map = PyObject_Vectorcall(view->encode, &number, 1, NULL);
  Py_DECREF(number);
  if (map && (!PyBytes_Check(map) || PyBytes_GET_SIZE(map) != MAP_BYTES)) {
    refuse("a map of another size");
    Py_CLEAR(map);
  }
  return map;
}

/* The bytes of all launches' parameters, one behind the other. */
static int fill(const Plan *self, const uint64_t *slots, unsigned char *bytes) {
  for (unsigned i = 0; i < self->launches; i++) {
    const Launch *launch = self->launch + i;
    memcpy(bytes, launch->bytes, launch->size);
    for (unsigned k = 0; k < launch->pointers; k++) {
      const Pointer *pointer = launch->pointer + k;
      uint64_t address = slots[pointer->slot] + pointer->beyond;
      memcpy(bytes + pointer->offset, &address, sizeof address);
    }
    for (unsigned k = 0; k < launch->maps; k++) {
      const View *view = self->view + launch->map[k].view;
      PyObject *map = map_at(view, slots[view->place]);
      if (!map) return -1;
      memcpy(bytes + launch->map[k].offset, PyBytes_AS_STRING(map), MAP_BYTES);
      Py_DECREF(map);
    }
    bytes += (launch->size + 63) / 64 * 64;
  }
  return 0;
}

static int launch_one(const Plan *self, const Launch *launch, unsigned char *bytes, void *stream) {
  void *parameters[MOST_PARAMETERS];
  for (unsigned k = 0; k < launch->parameters; k++) parameters[k] = bytes + launch->offsets[k];
  Config config = launch->config;
  config.stream = stream;
  return self->launcher(&config, launch->function, parameters, NULL);
}

/* Launch all; what the driver refuses is shown to Python, which raises, or mends it for another try. */
static int launch_all(const Plan *self, unsigned char *bytes, void *stream) {
  unsigned next = 0, tries = 0;
  while (next < self->launches) {
    int code = 0;
    Py_BEGIN_ALLOW_THREADS;
    while (next < self->launches) {
      code = launch_one(self, self->launch + next, bytes, stream);
      if (code) break;
      bytes += (self->launch[next++].size + 63) / 64 * 64;
      tries = 0;
    }
    Py_END_ALLOW_THREADS;
    if (code) {
      PyObject *done = PyObject_CallFunction(self->recover, "IiI", next, code, tries++);
      if (!done) return -1;
      Py_DECREF(done);
    }
  }
  return 0;
}

/* Memory between the launches of one call. The next call on the same stream runs behind it, so that it may have the same: each
   stream keeps the last, as cuBLAS keeps its own, since an allocation costs the host as much as half a launch. A call takes it out
   for as long as it launches: another thread's, in between on the same stream, finds none and allocates. What is captured in a
   graph outlives its call, and has memory of the graph's own. */
typedef struct {
  PyObject *tensor; /* NULL while it is taken */
  uint64_t address, bytes, stream;
  long device;
} Room;

static Room rooms[MOST_ROOMS];

static PyObject *rooms_clear(PyObject *module, PyObject *ignored) {
  for (unsigned i = 0; i < MOST_ROOMS; i++) {
    PyObject *tensor = rooms[i].tensor;
    memset(rooms + i, 0, sizeof(Room));
    Py_XDECREF(tensor);
  }
  Py_RETURN_NONE;
}

/* The place of a stream's room: its own, or one that nobody has; NULL where all are taken. */
static Room *place_of(const Room *room) {
  Room *unused = NULL;
  for (unsigned i = 0; i < MOST_ROOMS; i++) {
    if (rooms[i].bytes && rooms[i].stream == room->stream && rooms[i].device == room->device) return rooms + i;
    if (!rooms[i].bytes && !unused) unused = rooms + i;
  }
  return unused;
}

/* A room for a call on a stream; kept is whether it may stay with the stream. 0, or -1 with an error set. */
static int room_taken(const Plan *self, uint64_t stream, Room *room, int *kept) {
  int status = 0;
  room->bytes = self->room_bytes;
  room->stream = stream;
  room->device = PyLong_AsLong(self->device);
  *kept = room->bytes <= MOST_ROOM_BYTES && !self->capturing((void *)(uintptr_t)stream, &status) && !status;
  Room *place = *kept ? place_of(room) : NULL;
  if (place && place->tensor && place->bytes >= room->bytes) {
    *room = *place;
    place->tensor = NULL;
    return 0;
  }
  room->tensor = made(self, &self->room, &room->address);
  return room->tensor ? 0 : -1;
}

/* Leave the larger of two with the stream. */
static void room_given_back(Room *room, int kept) {
  Room *place = kept ? place_of(room) : NULL;
  PyObject *left = room->tensor;
  if (place && (!place->tensor || place->bytes < room->bytes)) {
    left = place->tensor;
    *place = *room;
  }
  Py_XDECREF(left);
}

static int run(const Plan *self, uint64_t *slots, PyObject **allocated) {
  unsigned char bytes[MOST_BYTES] __attribute__((aligned(64)));
  uint64_t stream, ignored;
  Room room = {0};
  int kept = 0;
  PyObject *tick = Py_TYPE(self->ticks)->tp_iternext(self->ticks);
  if (!tick) return -1;
  Py_DECREF(tick);
  for (unsigned i = 0; i < self->makes; i++)
    if (!(allocated[i] = made(self, self->make + i, self->make[i].addressed ? slots + self->given + i : &ignored))) return -1;
  if (address(self->stream_of, self->device, &stream)) return -1;
  if (self->room.function && room_taken(self, stream, &room, &kept)) return -1;
  slots[self->given + self->makes] = room.address;
  int failed = fill(self, slots, bytes) || launch_all(self, bytes, (void *)(uintptr_t)stream);
  if (self->room.function) room_given_back(&room, kept && !failed); /* it stays until the last launch is on its way */
  return failed ? -1 : 0;
}

/* What the caller is given: results by their places, alone, as a tuple or as a list. */
static PyObject *results_of(PyObject *const *tensors, PyObject *const *allocated, unsigned given, PyObject *places, int listed) {
  Py_ssize_t count = PyTuple_GET_SIZE(places);
  if (!count && !listed) Py_RETURN_NONE;
  PyObject *results = count == 1 && !listed ? NULL : listed ? PyList_New(count) : PyTuple_New(count);
  if (!results && (count != 1 || listed)) return NULL;
  for (Py_ssize_t i = 0; i < count; i++) {
    unsigned long place = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(places, i));
    PyObject *result = Py_NewRef(place < given ? tensors[place] : allocated[place - given]);
    if (!results) return result;
    if (listed)
      PyList_SET_ITEM(results, i, result);
    else
      PyTuple_SET_ITEM(results, i, result);
  }
  return results;
}

/* A call that is known: its types and options, what compares its tensors, and its plan. */
typedef struct {
  PyObject_HEAD
  PyObject *kinds, *options, *guard, *places;
  Plan *plan;
  int gradients, listed;
} Known;

static void known_dealloc(Known *self) {
  Py_XDECREF(self->kinds);
  Py_XDECREF(self->options);
  Py_XDECREF(self->guard);
  Py_XDECREF(self->places);
  Py_XDECREF((PyObject *)self->plan);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Whether the call has as many tensors as the plan takes, and results that the plan has. */
static int known_fits(const Known *self) {
  const unsigned values = self->plan->given + self->plan->makes;
  Py_ssize_t tensors = 0;
  if (PyTuple_GET_SIZE(self->kinds) != PyTuple_GET_SIZE(self->options)) return 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->kinds); i++)
    tensors += PyTuple_GET_ITEM(self->options, i) == PyTuple_GET_ITEM(self->kinds, i);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->places); i++) {
    unsigned long place = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(self->places, i));
    if (PyErr_Occurred() || place >= values) return 0;
  }
  return tensors == self->plan->given && tensors;
}

/* Known(kinds, options, guard, gradients, plan, places, listed): options has the type itself where a tensor is. */
static PyObject *known_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
  PyObject *kinds, *options, *guard, *plan, *places;
  int gradients, listed;
  if (!PyArg_ParseTuple(args, "O!O!OpO!O!p", &PyTuple_Type, &kinds, &PyTuple_Type, &options, &guard, &gradients, &PlanType, &plan,
                        &PyTuple_Type, &places, &listed))
    return NULL;
  Known *self = (Known *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->kinds = Py_NewRef(kinds);
  self->options = Py_NewRef(options);
  self->guard = Py_NewRef(guard);
  self->places = Py_NewRef(places);
  self->plan = (Plan *)Py_NewRef(plan);
  self->gradients = gradients;
  self->listed = listed;
  if (known_fits(self)) return (PyObject *)self;
  Py_DECREF(self);
  PyErr_Clear();
  return refuse("a plan for other arguments or results"), NULL;
}

static PyTypeObject KnownType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "dsa_codegen.runtime.Known",
    .tp_basicsize = sizeof(Known),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = known_new,
    .tp_dealloc = (destructor)known_dealloc,
};

/* The known calls of one function, the latest first. */
typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *watched[2], *grad_enabled;
  unsigned count;
  Known *known[MOST_KNOWN];
} Hits;

static PyObject *hits_clear(Hits *self, PyObject *ignored) {
  while (self->count) Py_DECREF((PyObject *)self->known[--self->count]);
  Py_RETURN_NONE;
}

static void hits_dealloc(Hits *self) {
  Py_XDECREF(hits_clear(self, NULL));
  Py_XDECREF(self->watched[0]);
  Py_XDECREF(self->watched[1]);
  Py_XDECREF(self->grad_enabled);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *hits_add(Hits *self, PyObject *known) {
  if (!PyObject_TypeCheck(known, &KnownType)) return refuse("takes what is Known"), NULL;
  Known *last = self->count == MOST_KNOWN ? self->known[--self->count] : NULL;
  memmove(self->known + 1, self->known, self->count++ * sizeof(Known *));
  self->known[0] = (Known *)Py_NewRef(known);
  Py_XDECREF((PyObject *)last);
  Py_RETURN_NONE;
}

static void to_front(Hits *self, Known *known) {
  unsigned place = 0;
  while (place < self->count && self->known[place] != known) place++;
  if (place && place < self->count) {
    memmove(self->known + 1, self->known, place * sizeof(Known *));
    self->known[0] = known;
  }
}

/* Whether a function that takes nothing says something else than no; -1 with an error set. */
static int says(PyObject *function) {
  PyObject *said = answer(function);
  int yes = said ? PyObject_IsTrue(said) : -1;
  Py_XDECREF(said);
  return yes;
}

/* Whether these are the known call's types and options; fills in its tensors. Nothing else runs meanwhile: options are numbers,
   texts or None. */
static int alike(const Known *known, PyObject *args, PyObject **tensors) {
  Py_ssize_t count = PyTuple_GET_SIZE(args);
  if (count != PyTuple_GET_SIZE(known->kinds)) return 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *value = PyTuple_GET_ITEM(args, i), *option = PyTuple_GET_ITEM(known->options, i);
    if ((PyObject *)Py_TYPE(value) != PyTuple_GET_ITEM(known->kinds, i)) return 0;
    if (option == (PyObject *)Py_TYPE(value))
      *tensors++ = value;
    else if (value != option) {
      int same = PyObject_RichCompareBool(value, option, Py_EQ);
      if (same <= 0) return same;
    }
  }
  return 1;
}

/* What a guard says of tensors. */
static PyObject *seen(PyObject *guard, PyObject *const *tensors, unsigned count) {
  PyObject *row = PyTuple_New(count);
  if (!row) return NULL;
  for (unsigned i = 0; i < count; i++) PyTuple_SET_ITEM(row, i, Py_NewRef(tensors[i]));
  PyObject *said = applied(guard, row);
  Py_DECREF(row);
  return said;
}

/* 1 where the known call's plan may serve these tensors, whose addresses are filled in; 0 where not, -1 with an error set. */
static int serves(const Hits *self, const Known *known, PyObject **tensors, uint64_t *slots) {
  const Plan *plan = known->plan;
  PyObject *looks = seen(known->guard, tensors, plan->given);
  if (!looks) return -1;
  Py_DECREF(looks);
  if (looks != Py_True) return 0;
  int wanted = known->gradients ? says(self->grad_enabled) : 0;
  if (wanted) return wanted < 0 ? -1 : 0;
  uint64_t together = 0;
  for (unsigned i = 0; i < plan->given; i++) {
    if (address(plan->address_of, tensors[i], slots + i)) return -1;
    together |= slots[i];
  }
  if (together % ALIGNMENT) return 0;
  PyObject *device = answer(plan->current_device);
  int same = device ? PyObject_RichCompareBool(device, plan->device, Py_EQ) : -1;
  Py_XDECREF(device);
  return same;
}

static PyObject *served(const Known *known, PyObject **tensors, uint64_t *slots) {
  PyObject *allocated[MOST_VALUES] = {NULL};
  const Plan *plan = known->plan;
  int failed = run(plan, slots, allocated);
  PyObject *results = failed ? NULL : results_of(tensors, allocated, plan->given, known->places, known->listed);
  for (unsigned i = 0; i < plan->makes; i++) Py_XDECREF(allocated[i]);
  return results;
}

/* 1 where some known call serves this one, which is then among ``found``; 0 where none does, -1 with an error set. */
static int find(Hits *self, PyObject *args, PyObject **tensors, uint64_t *slots, Known **found) {
  int seen = -1; /* whether something on this thread looks at the operators that torch runs; not asked yet */
  for (unsigned i = 0; i < self->count; i++) {
    Known *known = self->known[i];
    int good = alike(known, args, tensors);
    if (good < 0) return -1;
    if (!good) continue;
    if (seen < 0) {
      for (unsigned k = 0; k < 2 && seen <= 0; k++)
        if ((seen = says(self->watched[k])) < 0) return -1;
      if (seen) return 0;
    }
    *found = (Known *)Py_NewRef((PyObject *)known); /* the list may change as soon as anything else runs */
    if ((good = serves(self, known, tensors, slots))) return good;
    Py_CLEAR(*found);
  }
  return 0;
}

/* hits(arguments): the results, or NotImplemented where no known call is like this one. */
static PyObject *hits_call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords) {
  Hits *self = (Hits *)callable;
  PyObject *tensors[MOST_VALUES], *results = NULL;
  uint64_t slots[MOST_VALUES];
  Known *known = NULL;
  if (PyVectorcall_NARGS(flags) != 1 || keywords || !PyTuple_Check(args[0])) return refuse("takes a tuple of arguments"), NULL;
  int good = find(self, args[0], tensors, slots, &known);
  if (good > 0) {
    to_front(self, known);
    results = served(known, tensors, slots);
  } else if (good == 0 || PyErr_ExceptionMatches(PyExc_RuntimeError)) { /* a tensor without memory, say: the long way tells */
    PyErr_Clear();
    results = Py_NewRef(Py_NotImplemented);
  }
  Py_XDECREF((PyObject *)known);
  return results;
}

/* Hits(function_modes, profiler_enabled, grad_enabled) */
static PyObject *hits_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
  PyObject *function_modes, *profiler_enabled, *grad_enabled;
  if (!PyArg_ParseTuple(args, "OOO", &function_modes, &profiler_enabled, &grad_enabled)) return NULL;
  Hits *self = (Hits *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->call = hits_call;
  self->watched[0] = Py_NewRef(function_modes);
  self->watched[1] = Py_NewRef(profiler_enabled);
  self->grad_enabled = Py_NewRef(grad_enabled);
  return (PyObject *)self;
}

static PyMethodDef hits_methods[] = {
    {"add", (PyCFunction)hits_add, METH_O, "Know one call more, and first."},
    {"clear", (PyCFunction)hits_clear, METH_NOARGS, "Know none."},
    {NULL},
};

static PyTypeObject HitsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "dsa_codegen.runtime.Hits",
    .tp_basicsize = sizeof(Hits),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Hits, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = hits_new,
    .tp_dealloc = (destructor)hits_dealloc,
    .tp_methods = hits_methods,
};

static PyTypeObject PlanType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "dsa_codegen.runtime.Plan",
    .tp_basicsize = sizeof(Plan),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = plan_new,
    .tp_dealloc = (destructor)plan_dealloc,
};

static PyMethodDef module_methods[] = {
    {"release", rooms_clear, METH_NOARGS, "Keep no memory."},
    {NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hits", "A call like an earlier one, in C.", -1, module_methods};

PyMODINIT_FUNC PyInit_hits(void) {
  PyObject *self = PyModule_Create(&module);
  if (!self || PyModule_AddType(self, &PlanType) || PyModule_AddType(self, &KnownType) || PyModule_AddType(self, &HitsType)) Py_CLEAR(self);
  return self;
}
