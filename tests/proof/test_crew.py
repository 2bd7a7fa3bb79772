"""Jobs shared by several workers: results in order, errors in their place, and nothing begun once time is up."""

from __future__ import annotations

import operator
import os
import pickle
import time

import pytest

from dsa_codegen.proof.crew import at_once
from dsa_codegen.worker import JobFailed, WorkerDied


def test_results_come_in_the_order_of_the_calls_and_errors_in_their_place():
    told = []
    found = at_once(operator.floordiv, [(7, 2), (1, 0), (9, 3)], 2, seconds=60, told=lambda *each: told.append(each))
    assert (found[0], found[2]) == (3, 3)
    assert isinstance(found[1], JobFailed)
    assert sorted(number for number, _ in told) == [0, 1, 2]


def test_a_process_that_ends_leaves_its_other_calls_to_a_new_one():
    found = at_once(os._exit, [(3,), (4,)], 1, seconds=60)
    assert all(isinstance(each, WorkerDied) for each in found)


def test_what_time_is_up_for_is_left():
    assert at_once(time.sleep, [(0,), (0,)], 1, seconds=0) == [None, None]


def test_a_call_that_cannot_be_sent_is_an_error_of_the_caller():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        at_once(operator.add, [(lambda: 1, 2)], 1, seconds=60)
