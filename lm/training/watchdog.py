"""A thread that says where the program stands when it stands too long.

Looks at a `Timeline` about once a second and writes nothing but reports; of many processes the first reports where each
of them stands. Law: it never touches the devices, so it goes on when they hang, and it never ends the program: that is
the launcher's decision.
"""

import contextlib
import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from lm.training.events import Events
from lm.training.timeline import Place, Timeline
from lm.training.whereabouts import Whereabouts

# Lines of the stack that are shown.
_DEPTH = 8
# Seconds that the thread may take to end.
_PATIENCE_AT_THE_END = 5.0


class Watchdog:
    """Watches the thread that makes it.

    Args:
      timeline: of the loop.
      events: where reports go besides stderr.
      step: tells the loop's step.
      say: prints a line.
      patience: seconds for which a phase may last of which nothing is known yet.
      whereabouts: of all processes; None is those of this run.
    """

    def __init__(
        self,
        timeline: Timeline,
        events: Events,
        step: Callable[[], int],
        say: Callable[[str], None],
        patience: float,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        self._timeline, self._events, self._step, self._say = timeline, events, step, say
        self._patience = patience
        self._whereabouts = Whereabouts() if whereabouts is None else whereabouts
        self._thread_id = threading.get_ident()
        self._reported = (-1, 0.0)
        self._told_of_recompilation = False

    def look(self) -> bool:
        """Reports if the phase lasts too long, again each time that it lasted twice as long; returns whether it did."""
        self._look_for_recompilation()
        place = self._timeline.place
        seconds = self._timeline.clock() - place.since
        self._whereabouts.sign(self._step() + 1, place.phase, seconds)
        limit = self._timeline.limit(place.phase)
        if limit is None:
            # What is expected may be far off, and is no reason to keep quiet for longer than the user would.
            limit = min(self._timeline.first_limit(place.phase) or self._patience, self._patience)
        number, at = self._reported
        if seconds <= (2 * at if number == place.number else limit):
            return False
        self._reported = (place.number, seconds)
        self._report(place, seconds)
        return True

    def _look_for_recompilation(self) -> None:
        """Tells once of a step that was compiled again; the log counts them all."""
        if self._told_of_recompilation or not self._timeline.recompilations:
            return
        self._told_of_recompilation = True
        self._say(
            f"recompiled: a program was compiled again at step {self._step() + 1} or the one before it: a shape or a "
            "dtype is not that of the first step. metrics.jsonl counts the recompilations"
        )
        self._events.write("recompiled", self._step() + 1, recompilations=self._timeline.recompilations)

    def _compare(self, phase: str) -> str:
        usual, first = self._timeline.median(phase), self._timeline.first_limit(phase)
        if usual is not None:
            return f"a usual one takes {usual:.3g} s"
        known = "nothing is known of what is usual" if first is None else f"{first:.3g} s would be much"
        return f"it is one of the first of its kind, {known}"

    def _report(self, place: Place, seconds: float) -> None:
        usual = self._timeline.median(place.phase)
        frame = sys._current_frames().get(self._thread_id)
        stack = [] if frame is None else [line.rstrip() for line in traceback.format_stack(frame)[-_DEPTH:]]
        others = self._whereabouts.read()
        self._say(
            f"slow: step {self._step() + 1} is in phase {place.phase} for {seconds:.1f} s; "
            f"{self._compare(place.phase)}. The program stands at:\n" + "\n".join([*stack, *map(str, others)])
        )
        facts = {"phase": place.phase, "seconds": seconds, "usual_seconds": usual, "stack": stack}
        if others:
            facts["processes"] = [dataclasses.asdict(one) for one in others]
        self._events.write("slow", self._step() + 1, **facts)

    @contextlib.contextmanager
    def watching(self, interval: float = 1.0) -> Iterator[None]:
        """Looks every `interval` seconds, in a thread of its own, while inside."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(interval):
                self.look()

        thread = threading.Thread(target=watch, daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            done.set()
            # It may wait for an answer of a process that is gone.
            thread.join(_PATIENCE_AT_THE_END)
            self._look_for_recompilation()
