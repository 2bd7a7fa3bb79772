"""Peers that agree, disagree, fail, crash or are missing, and a stopwatch that needs no GPU; also loaded by child processes."""

from __future__ import annotations

import os

from dsa_codegen.bench.peers import Peer
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.bench.stage import Prepared
from dsa_codegen.proof.stopwatch import Stopwatch

STAGES = ("indexer_prefill",)


class Clock(Stopwatch):
    """Time passes only where somebody says so; without anybody a run takes 20 µs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def capture(self, calls):
        return lambda: [call() for call in calls]

    def time_us(self, run):
        before = self.now
        run()
        return self.now - before or 20.0


class Fake(Peer):
    """Answers with the reference; ``clock`` and ``takes_us`` are set by tests in the same process."""

    stages = STAGES
    distributions = ("torch",)
    clock: Clock | None = None
    takes_us = 3.0
    label = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self):
        return None

    def prepare(self, case, inputs):
        answer = stage_of(case.stage).reference(case, inputs)["logits"]

        def run():
            if self.clock is not None:
                self.clock.now += self.takes_us
                self.clock.log.append(self.name)
            return self.result(answer)

        return Prepared(self.label or self.name, run, lambda logits: {"logits": logits})

    def result(self, answer):
        return answer.clone()


class Missing(Fake):
    def available(self):
        return "missing is not installed"


class Broken(Fake):
    """An adapter whose library breaks when it is looked at, and which cannot say what it compiles."""

    def available(self):
        raise KeyError("driver")

    def build_key(self, case):
        raise AttributeError("no such constant")


class Disagreeing(Fake):
    def result(self, answer):
        return answer * 1.5


class Raising(Fake):
    def result(self, answer):
        raise ValueError("an answer that\nnobody wants")


class Unwilling(Fake):
    def prepare(self, case, inputs):
        return None


class Lazy(Fake):
    """Gives back what it finds in memory."""

    kept: list = []  # noqa: RUF012

    def result(self, answer):
        if not self.kept:
            self.kept.append(answer.clone())
        return self.kept[0]


class Crashing(Fake):
    def result(self, answer):
        if "DSA_FAKE_CRASH" in os.environ:
            os._exit(3)
        return answer.clone()


class Padded(Fake):
    label = "padded (padded to 64)"


PEERS = (
    Fake("fast"),
    Missing("missing"),
    Broken("broken"),
    Disagreeing("disagreeing"),
    Raising("raising"),
    Unwilling("unwilling"),
    Crashing("crashing"),
    Padded("padded"),
)
