"""The worker: a job that cannot be sent leaves it ready for the next one."""

from __future__ import annotations

import operator
import pickle

import pytest

from dsa_codegen.worker import Worker


def test_a_job_that_cannot_be_pickled_does_not_keep_it_busy():
    with Worker() as worker:
        with pytest.raises((pickle.PicklingError, AttributeError)):
            worker.call(lambda: 1)
        assert not worker.busy
        assert worker.call(operator.add, 1, 2) == 3
