"""A federation of the release path's real machines on a mock clock, mock disks and a mock network, all of them hostile.

The task is a toy: every computation adds fresh noise, as a private one would, so a payload that is computed twice shows.
`run_schedule(seed)` plays one random schedule of crashes, losses, resends, reorderings, refusals and voids, checks what
must never happen while it runs and when it ends, and returns what did happen. The same seed plays the same schedule.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from fedlearn.aggregation.linear import IntegerSum
from fedlearn.arrays import Spec, from_bytes, to_bytes
from fedlearn.clock import MockClock
from fedlearn.errors import RemoteProtocolError
from fedlearn.release import (
    TRAIN,
    UNMASK,
    AttemptId,
    Begin,
    Charge,
    CostCharger,
    Failed,
    Finished,
    MemoryDisk,
    MemoryJournal,
    NoMasking,
    Refused,
    Release,
    ReleaseKey,
    Reserved,
    RoundMachine,
    RoundPolicy,
    RoundState,
    SiteGate,
    SitePolicy,
)
from fedlearn.release.journal import replay

RUN = "toy/run"
COST = Decimal(2)
LENGTH = 3
SPECS = {"v": Spec((LENGTH,), "int64")}
MAX_EVENTS = 20_000


class ViolationError(AssertionError):
    """Something happened that must never happen."""


class Crash(BaseException):
    """The power of one machine fails in the middle of an operation."""


@dataclass(frozen=True)
class Ask:
    key: ReleaseKey
    base: AttemptId | None
    request: bytes = b""


@dataclass(frozen=True)
class Answer:
    key: ReleaseKey
    payload: bytes
    request: bytes = b""


@dataclass(frozen=True)
class No:
    key: ReleaseKey
    reason: str


@dataclass(frozen=True)
class Voided:
    at: AttemptId


@dataclass(frozen=True)
class Over:
    base: AttemptId | None


@dataclass(frozen=True)
class OverHeard:
    pass


@dataclass(frozen=True)
class Kinds:
    """The classes under test; a mutation test puts broken ones in."""

    gate: type[SiteGate] = SiteGate
    machine: type[RoundMachine] = RoundMachine
    disk: type[CrashingDisk] | None = None


@dataclass(frozen=True)
class Plan:
    """What one schedule is like. Drawn from the seed."""

    sites: int
    rounds: int
    masked: bool
    min_survivors: int
    max_attempts: int
    max_voids: int
    budgets: tuple[Decimal, ...]
    loss: float
    duplicate: float
    crash_at_disk: float
    crash_anywhere: float
    vanish: float
    spoil: float
    give_up: float
    hostile: float
    slow: float

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        sites = rng.randint(2, 4)
        rounds = rng.randint(1, 4)
        calm = rng.random() < 0.2
        odds = (lambda *choices: 0.0) if calm else (lambda *choices: rng.choice(choices))
        return cls(
            sites=sites,
            rounds=rounds,
            masked=rng.random() < 0.5,
            min_survivors=rng.randint(1, sites),
            max_attempts=rng.randint(1, 4),
            max_voids=rng.randint(0, 4),
            budgets=tuple(COST * rng.choice([0, 1, rounds, 100, 100, 100]) for _ in range(sites)),
            loss=odds(0.0, 0.1, 0.4),
            duplicate=odds(0.0, 0.1, 0.4),
            crash_at_disk=odds(0.0, 0.05, 0.2),
            crash_anywhere=odds(0.0, 0.02, 0.1),
            vanish=odds(0.0, 0.0, 0.3),
            spoil=odds(0.0, 0.0, 0.05),
            give_up=odds(0.0, 0.0, 0.05, 0.2),
            hostile=odds(0.0, 0.0, 0.1),
            slow=odds(0.0, 0.1),
        )


class CrashingDisk(MemoryDisk):
    """Fails at a random operation, while the world still has crashes left."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def step(self, operation: str) -> None:
        world = self._world
        if world.crashes_left > 0 and world.rng.random() < world.plan.crash_at_disk:
            world.happened[f"crash at {operation}"] += 1
            raise Crash(operation)

    def power_cut(self) -> None:
        """All, nothing or any part of what was not synced survives."""
        unsynced = self.unsynced()
        self.crash(self._world.rng.choice([0, unsynced, self._world.rng.randint(0, unsynced)]))


class Total:
    """The toy task's sum: the product's own integer accumulator."""

    def __init__(self) -> None:
        self.sum = IntegerSum(SPECS, quantum_bits=0)

    def add(self, client: str, payload: bytes) -> None:
        self.sum.add(from_bytes(payload), 1)

    def values(self) -> list[int]:
        return [int(v) for v in self.sum.integers()["v"]]


class ToyMasking:
    """Each survivor gives its own mask, for exactly one set of survivors."""

    def __init__(self) -> None:
        self._survivors: tuple[str, ...] = ()
        self._masks: dict[str, dict] = {}

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        self._survivors = survivors
        return dict.fromkeys(survivors, json.dumps([key.round, key.attempt, *survivors]).encode())

    def answer(self, client: str, answer: bytes) -> None:
        mask = from_bytes(answer)
        if set(mask) != {"v"}:
            raise RemoteProtocolError("not a mask")
        self._masks[client] = mask

    def ready(self) -> bool:
        return set(self._masks) == set(self._survivors)

    def unmask(self, total: Total) -> None:
        for mask in self._masks.values():
            total.sum.add({"v": -mask["v"]}, 1)


class Actor:
    """A process with a disk. A crash loses everything but what the disk keeps."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disk = (world.kinds.disk or CrashingDisk)(world)
        self.life = 0
        self.running = False

    def start(self) -> None:
        self.running = True

    def act(self, what: Callable[[], None]) -> None:
        """Do something that may crash this process."""
        if not self.running:
            return
        try:
            what()
        except Crash:
            self.crash()

    def crash(self) -> None:
        world = self.world
        world.crashes_left -= 1
        world.happened[f"{type(self).__name__} crashed"] += 1
        self.life += 1
        self.running = False
        self.disk.power_cut()
        world.after_crash(self)
        if isinstance(self, Site) and world.rng.random() < world.plan.vanish:
            world.happened["site vanished"] += 1
            return
        world.later(world.rng.uniform(0.1, 8.0), self.restart)

    def restart(self) -> None:
        if not self.running:
            self.start()

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        """Something that this process will do, unless it has died by then."""
        life = self.life
        self.world.later(delay_s, lambda: self.act(what) if self.life == life else None)


class Site(Actor):
    def __init__(self, world: World, name: str, budget: Decimal) -> None:
        super().__init__(world, name)
        self.charger = CostCharger({name: budget})
        self.budget = budget

    def start(self) -> None:
        super().start()
        self.masks: dict[AttemptId, np.ndarray] = {}  # keys never reach the disk
        self.gate = self.world.kinds.gate(
            MemoryJournal(self.disk), self.charger, SitePolicy(max_voids_per_run=self.world.plan.max_voids)
        )
        self.world.check_ledger(self)

    def heard(self, message: object) -> None:
        if isinstance(message, Ask):
            self.asked(message)
        elif isinstance(message, Voided):
            self.gate.voided(RUN, message.at)
        elif isinstance(message, Over):
            refused = self.gate.settle(RUN, message.base)
            if refused is not None and not self.world.hostile_seen:
                raise ViolationError(f"{self.name}: {refused}")
            self.world.send(self.name, "coordinator", OverHeard())

    def asked(self, ask: Ask) -> None:
        charge = Charge(self.name, str(COST)) if ask.key.exchange == TRAIN else None
        answer = self.gate.reserve(ask.key, base=ask.base, charge=charge, request=ask.request)
        if isinstance(answer, Finished):
            self.world.happened["resent"] += 1
            self.world.send(self.name, "coordinator", Answer(ask.key, answer.payload, ask.request))
        elif isinstance(answer, Refused):
            self.world.happened[f"refused: {answer.reason.value}"] += 1
            self.world.send(self.name, "coordinator", No(ask.key, answer.reason.value))
        elif isinstance(answer, Reserved):
            slow = self.world.rng.random() < self.world.plan.slow
            self.later(self.world.rng.uniform(0.0, 40.0 if slow else 2.0), lambda: self.computed(ask, answer))

    def computed(self, ask: Ask, reserved: Reserved) -> None:
        rng = self.world.rng
        if ask.key.exchange == UNMASK:
            if ask.key.at not in self.masks:
                self.world.happened["keys lost"] += 1
                self.gate.abandon(ask.key)
                self.world.send(self.name, "coordinator", No(ask.key, "keys lost"))
                return
            self.finish(ask, to_bytes({"v": self.masks[ask.key.at]}), None)
            return
        noisy = np.array([rng.randrange(2**20) for _ in range(LENGTH)], dtype=np.int64)
        mask = np.array([rng.randrange(2**40) if self.world.plan.masked else 0 for _ in range(LENGTH)], dtype=np.int64)
        if rng.random() < self.world.plan.spoil:
            payload = to_bytes({"v": np.full(LENGTH + 1, np.nan)})
        else:
            payload = to_bytes({"v": noisy + mask})
        self.masks[ask.key.at] = mask
        self.world.plain[self.name, payload] = [int(v) for v in noisy]
        applied = json.loads(reserved.state or b"[]")
        self.finish(ask, payload, json.dumps([*applied, ask.key.at]).encode())

    def finish(self, ask: Ask, payload: bytes, state: bytes | None) -> None:
        answer = self.gate.commit(ask.key, payload, state=state)
        if isinstance(answer, Refused):
            self.world.happened[f"commit refused: {answer.reason.value}"] += 1
            return
        self.world.send(self.name, "coordinator", Answer(ask.key, self.gate.release(ask.key), ask.request))

    def durable_gate(self) -> SiteGate:
        """What a restart after a loss of power would find."""
        disk = MemoryDisk()
        disk.append(self.disk.durable())
        return SiteGate(MemoryJournal(disk), self.charger)


class Coordinator(Actor):
    DEADLINE_S = 25.0
    TICK_S = 3.0

    def __init__(self, world: World) -> None:
        super().__init__(world, "coordinator")
        self.ended: str | None = None
        self.told: set[str] = set()

    def start(self) -> None:
        super().start()
        plan = self.world.plan
        self.machine = self.world.kinds.machine(
            MemoryJournal(self.disk),
            RUN,
            Total,
            policy=RoundPolicy(min_survivors=plan.min_survivors, max_attempts=plan.max_attempts),
            masking=ToyMasking if plan.masked else NoMasking,
        )
        self.told = set()
        if self.machine.state is RoundState.REFILL:
            self.world.happened["refill"] += 1
        self.deadline_s = self.world.clock.monotonic() + self.DEADLINE_S
        self.later(self.TICK_S, self.tick)
        self.act(self.go_on)

    def heard(self, client: str, message: object) -> None:
        machine = self.machine
        if isinstance(message, OverHeard):
            self.told.add(client)
        elif self.ended is not None or machine.state in {RoundState.IDLE, RoundState.FAILED}:
            return
        elif isinstance(message, Answer) and message.key.exchange == UNMASK:
            self.note(machine.unmasked(client, message.key, message.payload))
        elif isinstance(message, Answer):
            self.note(machine.receive(client, message.key, message.payload))
        elif isinstance(message, No) and message.key.at == machine.key.at:
            machine.gone(client)
        self.go_on()

    def note(self, answer: object) -> None:
        reason = getattr(answer, "reason", None)
        self.world.happened[f"{type(answer).__name__}{f': {reason.value}' if reason else ''}"] += 1

    def go_on(self) -> None:
        """Take every step that can be taken now."""
        machine = self.machine
        while True:
            step = machine.next_step
            if isinstance(step, Failed):
                self.end(f"failed: {step.reason}")
                return
            if isinstance(step, Begin):
                if machine.state is RoundState.VOID:
                    self.world.happened["void"] += 1
                    for name in self.world.sites:
                        self.world.send(self.name, name, Voided(machine.key.at))
                if step.at.round > self.world.plan.rounds:
                    self.end("finished")
                    return
                machine.begin(step.at, list(self.world.sites), f"model-{step.at.round}")
                self.deadline_s = self.world.clock.monotonic() + self.DEADLINE_S
                self.ask()
                return
            if machine.state is RoundState.OPEN and not machine.waiting:
                machine.close()
            elif machine.state is RoundState.SUMMED:
                record = {"at": machine.key.at, "survivors": machine.survivors, "total": machine.total.values()}
                machine.commit(json.dumps(record).encode())
            else:
                return

    def ask(self) -> None:
        machine = self.machine
        if machine.state in {RoundState.OPEN, RoundState.REFILL}:
            for client in sorted(machine.waiting):
                self.world.send(self.name, client, Ask(machine.key, machine.base_of(client)))
        elif machine.state is RoundState.UNMASKING:
            key, requests = machine.unmask_requests()
            for client in sorted(machine.waiting):
                self.world.send(self.name, client, Ask(key, machine.base_of(client), requests[client]))

    def tick(self) -> None:
        self.later(self.TICK_S, self.tick)
        if self.ended is not None:
            for name in sorted(set(self.world.sites) - self.told):
                self.world.send(self.name, name, Over(self.machine.base_of(name)))
            return
        machine = self.machine
        late = self.world.clock.monotonic() >= self.deadline_s
        if self.world.rng.random() < self.world.plan.give_up:
            machine.void("given up by the operator")
        elif late and machine.state is RoundState.OPEN:
            machine.close()
        elif late:
            machine.void("the deadline passed")
        self.go_on()
        self.ask()

    def end(self, how: str) -> None:
        self.ended = how


@dataclass
class World:
    """Clock, network and judge."""

    seed: int
    kinds: Kinds
    plan: Plan
    rng: random.Random
    clock: MockClock = field(default_factory=MockClock)
    happened: Counter[str] = field(default_factory=Counter)
    plain: dict[tuple[str, bytes], list[int]] = field(default_factory=dict)
    wire: dict[tuple[str, AttemptId, str], Answer] = field(default_factory=dict)
    unmask_asked: dict[AttemptId, bytes] = field(default_factory=dict)
    ledger_seen: Counter[str] = field(default_factory=Counter)
    sent: list[tuple[str, str, object]] = field(default_factory=list)
    crashes_left: int = 12
    hostile_left: int = 10
    hostile_seen: bool = False

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.sites = {f"site-{i}": Site(self, f"site-{i}", b) for i, b in enumerate(self.plan.budgets)}
        self.coordinator = Coordinator(self)

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.monotonic() + delay_s, next(self._order), what))

    def send(self, source: str, target: str, message: object, *, judged: bool = True) -> None:
        """Put a message on the wire: it is judged there, then lost, delayed, doubled or overtaken."""
        if judged:
            self.judge(source, message)
            self.sent.append((source, target, message))
        copies = 0 if self.rng.random() < self.plan.loss else 1 + (self.rng.random() < self.plan.duplicate)
        for _ in range(copies):
            delay_s = self.rng.uniform(0.0, 10.0) if self.rng.random() < 0.1 else self.rng.uniform(0.0, 1.0)
            self.later(delay_s, lambda: self.deliver(source, target, message))

    def deliver(self, source: str, target: str, message: object) -> None:
        if target == "coordinator":
            self.coordinator.act(lambda: self.coordinator.heard(source, message))
        else:
            self.sites[target].act(lambda: self.sites[target].heard(message))

    def play(self) -> None:
        for actor in (*self.sites.values(), self.coordinator):
            actor.start()
        self.later(1.0, self.mischief)
        for _ in range(MAX_EVENTS):
            when_s, _, what = heapq.heappop(self._events)
            self.clock.advance(max(0.0, when_s - self.clock.monotonic()))
            what()
            if self.coordinator.running and self.coordinator.ended is not None and self.all_told():
                break
        else:
            raise ViolationError(f"the run did not end in {MAX_EVENTS} events")
        self.judge_end()

    def all_told(self) -> bool:
        return all((not s.running and s.life) or name in self.coordinator.told for name, s in self.sites.items())

    def mischief(self) -> None:
        """Power cuts between operations, and messages that no honest coordinator sends."""
        self.later(1.0, self.mischief)
        actor = self.rng.choice([*self.sites.values(), self.coordinator])
        if actor.running and self.crashes_left > 0 and self.rng.random() < self.plan.crash_anywhere:
            actor.crash()
        asks = [s for s in self.sent[-50:] if isinstance(s[2], Ask)]
        if asks and self.hostile_left > 0 and self.rng.random() < self.plan.hostile:
            self.hostile_left -= 1
            self.hostile_seen = True
            self.happened["hostile"] += 1
            _, target, ask = self.rng.choice(asks)
            key = ask.key
            forged = self.rng.choice(
                [
                    ReleaseKey(key.run, key.round, key.attempt, key.exchange, "another-model"),
                    ReleaseKey(key.run, max(0, key.round - 1), key.attempt, key.exchange, key.model_digest),
                    ReleaseKey(key.run, key.round, key.attempt, UNMASK, key.model_digest),
                ]
            )
            request = b'["site-0"]' if forged.exchange == UNMASK else b""
            self.send("coordinator", target, Ask(forged, ask.base, request), judged=False)

    # What must never happen.

    def judge(self, source: str, message: object) -> None:
        if isinstance(message, Ask) and message.key.exchange == UNMASK:
            asked = self.unmask_asked.setdefault(message.key.at, message.request)
            if asked != message.request:
                raise ViolationError(f"coordinator asked to unmask {message.key.at} for two sets of survivors")
        if not isinstance(message, Answer):
            return
        site, key = self.sites[source], message.key
        first = self.wire.setdefault((source, key.at, key.exchange), message)
        if first != message:
            raise ViolationError(f"{source}: two different answers on the wire for {key}")
        durable = {r.key: r for r in self.durable_releases(site)}
        if key not in durable:
            raise ViolationError(f"{source}: {key} is on the wire and not on the disk")
        trained = sum(1 for name, _, exchange in self.wire if name == source and exchange == TRAIN)
        if trained * COST > site.budget:
            raise ViolationError(f"{source}: sent {trained} updates over its budget {site.budget}")
        attempts = Counter(at.round for name, at, exchange in self.wire if name == source and exchange == TRAIN)
        voids = sum(n - 1 for n in attempts.values())
        if voids > self.plan.max_voids:
            raise ViolationError(f"{source}: sent again after {voids} voids, the site allows {self.plan.max_voids}")
        self.check_ledger(site)

    def durable_releases(self, site: Site) -> list[Release]:
        records, _ = replay(site.disk.durable())
        return [Release.from_record(v, what=k) for k, v in records.items() if k.startswith("release/")]

    def check_ledger(self, site: Site) -> None:
        """The durable record is never below what was on the wire, and never shrinks."""
        charged = sum((Decimal(r.charge.cost) for r in self.durable_releases(site) if r.charge), start=Decimal(0))
        trained = sum(1 for name, _, exchange in self.wire if name == site.name and exchange == TRAIN)
        if charged < trained * COST:
            raise ViolationError(f"{site.name}: the ledger says {charged}, {trained * COST} was released")
        if charged < self.ledger_seen[site.name]:
            raise ViolationError(f"{site.name}: the ledger fell from {self.ledger_seen[site.name]} to {charged}")
        self.ledger_seen[site.name] = int(charged)

    def after_crash(self, actor: Actor) -> None:
        if isinstance(actor, Site):
            self.check_ledger(actor)

    def judge_end(self) -> None:
        coordinator, plan = self.coordinator, self.plan
        machine = RoundMachine(MemoryJournal(coordinator.disk), RUN, Total)
        commits = []
        for number in itertools.count(1):
            if (record := machine.record(number)) is None:
                break
            commits.append(json.loads(record))
        step = machine.next_step
        if coordinator.ended == "finished":
            if step != Begin(AttemptId(plan.rounds + 1, 1)) or len(commits) != plan.rounds:
                raise ViolationError(f"finished with {len(commits)} of {plan.rounds} rounds, next {step}")
        elif not isinstance(step, Failed) or not step.reason:
            raise ViolationError(f"ended as {coordinator.ended!r} without a reason, next {step}")
        self.happened[str(coordinator.ended).split(":")[0]] += 1
        counted: dict[str, list[list[int]]] = {name: [] for name in self.sites}
        for record in commits:
            at = AttemptId(*record["at"])
            if len(record["survivors"]) < plan.min_survivors:
                raise ViolationError(
                    f"{at}: committed with {record['survivors']}, at least {plan.min_survivors} needed"
                )
            exact = [0] * LENGTH
            for name in record["survivors"]:
                payload = self.wire[name, at, TRAIN].payload
                exact = [a + b for a, b in zip(exact, self.plain[name, payload], strict=True)]
                counted[name].append(list(at))
            if record["total"] != exact:
                raise ViolationError(f"{at}: committed {record['total']}, the survivors sent {exact}")
        for name, site in self.sites.items():
            self.check_ledger(site)
            applied = json.loads(site.durable_gate().state(RUN) or b"[]")
            wanted = counted[name] if name in coordinator.told else counted[name][: len(applied)]
            if applied != wanted:
                raise ViolationError(f"{name}: its state holds {applied}, it was counted in {counted[name]}")


def run_schedule(seed: int, kinds: Kinds | None = None) -> Counter[str]:
    """Play one schedule.

    Returns:
        How often what happened.

    Raises:
        ViolationError: something happened that must never happen.
    """
    rng = random.Random(seed)
    world = World(seed, kinds or Kinds(), Plan.draw(rng), rng)
    world.play()
    return world.happened
