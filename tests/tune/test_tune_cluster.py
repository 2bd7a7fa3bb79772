"""Several hosts: studies as tasks of a Ray cluster, whose hosts may be lost while they search; records come to one folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from dsa_codegen.errors import InputError
from dsa_codegen.problem.op import Case
from dsa_codegen.records import files as records
from dsa_codegen.tune import sweep as sweeps
from dsa_codegen.tune.problem import Problem
from dsa_codegen.tune.replay import METHOD, SweptSpace
from dsa_codegen.tune.study import Study

ray = pytest.importorskip("ray", reason="the extra ray")
from dsa_codegen.tune.cluster import Cluster  # noqa: E402

from ray_jobs import Replays  # noqa: E402

pytestmark = pytest.mark.slow
SWEEP = Path(__file__).resolve().parents[2] / "benchmarks" / "sweeps" / "select-cuda-h200.json"
TRIALS = 24


@pytest.fixture
def hosts():
    """A cluster of this machine's processes: the asking host, which searches nothing, and two others."""
    from ray.cluster_utils import Cluster as Local

    local = Local(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"asks": 1}})
    for _ in range(2):
        local.add_node(num_cpus=2, resources={"searches": 2})
    local.wait_for_nodes()
    yield local
    ray.shutdown()
    local.shutdown()


def studies_of(folder: Path) -> dict[Study, Problem]:
    """A study for each case of the sweep."""
    sweep, found = sweeps.read(SWEEP), {}
    for number, swept in enumerate(sweep.cases):
        space = SweptSpace.of(sweep, number)
        problem = Problem(sweep.op, sweep.spec, Case(swept.case.sizes, swept.case.distribution), space.gpu)
        found[Study(space, swept.case, folder, method=METHOD, trials=TRIALS, seeds=[swept.default])] = problem
    return found


def test_a_lost_host_costs_the_trials_it_was_at(hosts, tmp_path):
    log = tmp_path / "judged"
    studies = studies_of(tmp_path / "journals")
    cluster = Cluster(hosts.address, Replays(SWEEP, log, 0.2), {"num_cpus": 1.0, "resources": {"searches": 1}})
    lost = []

    def lose_one() -> None:
        while sum(len(study.seen) for study in studies) < TRIALS // 2:
            time.sleep(0.05)
        lost.append(sum(len(study.seen) for study in studies))
        hosts.remove_node(hosts.list_all_nodes()[-1], allow_graceful=False)

    threading.Thread(target=lose_one, daemon=True).start()
    cluster.search(studies, time.time() + 900, lambda: None)
    assert lost and TRIALS // 2 <= lost[0] < len(studies) * TRIALS, "it was lost in the middle"
    assert {len(study.seen) for study in studies} == {TRIALS}
    lines = [line.split() for line in log.read_text().splitlines()]
    judged = Counter(tuple(line[1:]) for line in lines)
    twice = sum(count - 1 for count in judged.values())
    assert twice <= 2, "no more than what the lost host's two tasks were judging is judged again"
    hosts_of = {case: {host for host, of, _ in lines if of == case} for _, case, _ in lines}
    assert any(len(each) == 2 for each in hosts_of.values()), "another host went on with a study"

    settled = {}
    wanted = [(problem, [study], study.seeds[0], {}) for study, problem in studies.items()]
    cluster.settle(wanted, 2.0, lambda problem, found: settled.update({problem.case.id: found}), lambda: None)
    cluster.close()
    records.merge(tmp_path / "tuned", [each.record for found in settled.values() for each in found])
    (path,) = (tmp_path / "tuned").glob("*/select.json")
    assert len(records.read_all(tmp_path / "tuned", "select")) == len(studies) and path.parent.name == "h200"
    for study in studies:
        (found,) = settled[study.case.id]
        assert found.record.time_us.median <= 1.05 * found.record.default_time_us
        study.close()


def test_no_cluster_is_said(tmp_path):
    with pytest.raises(InputError, match="address of a Ray cluster"):
        Cluster("127.0.0.1:1")
