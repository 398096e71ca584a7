"""UL2's mixture of denoisers, for two stacks or one: span corruption of several kinds, and prefix LM.

Owns the mixture, its mode tokens and the published lists of denoisers; the corruption itself is in
`span_corruption` and `prefix`. Law: the denoiser is drawn per segment from the document's own key, and a
mode token is counted when segments are planned.

Tokens [10 ... 19] under X(3, .5), mode X 7, sentinels 99, 98, runs [13 ... 15] and [18, 19]:

    source [7, 10, 11, 12, 99, 16, 17, 98]   target [99, 13, 14, 15, 98, 18, 19]
"""

import dataclasses
from typing import Literal

import numpy as np

from lm.batch import MODES, Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CORRUPTION, Context, Frame, Traits
from lm.objectives.noise import SpanNoise, SuffixNoise
from lm.objectives.prefix import PrefixLM
from lm.objectives.span_corruption import SpanCorruption
from lm.objectives.text_to_text import TextToText, find_problems, take_segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One component of UL2.

    Attributes:
      mode: regular, sequential or extreme: which mode token begins the source.
      noise: what is corrupted: runs that sentinels replace, or the rest of the text after a prefix.
      weight: relative share of the segments.
    """

    mode: Literal["R", "S", "X"]
    noise: SpanNoise | SuffixNoise
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The name in logs, e.g. X(64,0.15) or S(0.25)."""
        numbers = [f"{value:g}" for value in dataclasses.astuple(self.noise) if not isinstance(value, bool)]
        return f"{self.mode}({','.join(reversed(numbers))})"

    def corruption(self, form: TextToText) -> SpanCorruption | PrefixLM:
        """Returns the objective that this denoiser is, without its mode token."""
        if isinstance(self.noise, SuffixNoise):
            return PrefixLM(noise=self.noise, format=form)
        return SpanCorruption(noise=self.noise, format=form)


def spans(mode: Literal["R", "X"], mean_span_length: float, noise_density: float, weight: float = 1.0) -> Denoiser:
    """Returns an R- or X-denoiser."""
    return Denoiser(
        mode=mode, noise=SpanNoise(noise_density=noise_density, mean_span_length=float(mean_span_length)), weight=weight
    )


def suffix(noise_density: float, weight: float = 1.0) -> Denoiser:
    """Returns an S-denoiser."""
    return Denoiser(mode="S", noise=SuffixNoise(noise_density=noise_density), weight=weight)


# UL2, table 1: two regular, one sequential and four extreme denoisers in equal shares.
UL2_DENOISERS = (
    spans("R", 3, 0.15),
    spans("R", 8, 0.15),
    suffix(0.25),
    spans("X", 3, 0.5),
    spans("X", 8, 0.5),
    spans("X", 64, 0.15),
    spans("X", 64, 0.5),
)
# UL2R, to continue a causal model (U-PaLM, section 3): half sequential, a quarter each regular and extreme,
# where extreme means a long span or a high rate.
UL2R_DENOISERS = (
    suffix(0.5, weight=0.5),
    spans("R", 3, 0.15, weight=0.25),
    spans("X", 32, 0.15, weight=0.125),
    spans("X", 3, 0.5, weight=0.125),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2:
    """Mixes denoisers, each announced by its mode token (Tay et al. 2022, sections 3.1 and 3.2).

    Paper's table and code differ in S: the mean suffix is a quarter of the text here (table); the appendix runs
    T5's `prefix_lm`, which is `suffix(0.5)`.

    Attributes:
      denoisers: the components; `UL2_DENOISERS` and `UL2R_DENOISERS` are the published ones.
      mode_tokens: whether the source begins with the denoiser's mode token.
      format: how source and target are laid out; for UL2R on a decoder, prefix "bidirectional".
    """

    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    mode_tokens: bool = True
    format: TextToText = TextToText()

    @property
    def traits(self) -> Traits:
        """Those of the format, with a component for each denoiser; prompts are those of S, or else of R or X."""
        names = tuple(denoiser.name for denoiser in self.denoisers)
        traits = dataclasses.replace(self.format.traits, fields=frozenset({"components"}), component_names=names)
        # What continues a text is the rest of it, which is what S-denoisers ask for.
        ordered = sorted(self.denoisers, key=lambda denoiser: ("S", "R", "X").index(denoiser.mode))
        frames = dict.fromkeys(self.frame(denoiser) for denoiser in ordered) or {traits.frame: None}
        first, *others = frames
        return dataclasses.replace(traits, frame=dataclasses.replace(first, others=tuple(others)))

    def frame(self, denoiser: Denoiser) -> Frame:
        """Returns the frame of a denoiser's sources and targets, its mode token included."""
        frame = denoiser.corruption(self.format).traits.frame
        if not self.mode_tokens:
            return frame
        return dataclasses.replace(frame, before=(f"modes[{MODES.index(denoiser.mode)}]",), mode=denoiser.mode)

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns one example for each segment of the document, each under a denoiser of its own."""
        rng = context.rng(CORRUPTION)
        vocabulary, specials = context.vocabulary, context.vocabulary.specials
        shares = np.array([denoiser.weight for denoiser in self.denoisers])
        shares = shares / shares.sum()
        examples = []
        rest = document.tokens
        while len(rest) >= 2:
            component = int(rng.choice(len(shares), p=shares))
            denoiser = self.denoisers[component]
            corruption = denoiser.corruption(self.format)
            size = take_segment(corruption, len(rest), context.lengths, int(self.mode_tokens))
            source, target = corruption.corrupt(rest[:size], vocabulary, rng)
            if self.mode_tokens:
                source = np.concatenate([[specials.modes[MODES.index(denoiser.mode)]], source])
            example = self.format.join(source, target, specials, context.lengths)
            components = np.full(len(example.inputs), component, np.int32)
            examples.append(dataclasses.replace(example, components=components))
            rest = rest[size:]
        return examples

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work, with the name of the denoiser that cannot."""
        problems = []
        if self.mode_tokens and len(specials.modes) < len(MODES):
            problems.append(f"mode_tokens needs the tokenizer's mode tokens R, S and X; it has {len(specials.modes)}")
        if not self.denoisers or any(d.weight < 0 for d in self.denoisers) or not sum(d.weight for d in self.denoisers):
            problems.append("denoisers needs at least one component, weights of 0 or more, and one above 0")
        for denoiser in self.denoisers:
            corruption = denoiser.corruption(self.format)
            extra = int(self.mode_tokens)
            found = denoiser.noise.problems() or find_problems(corruption, specials, lengths, extra=extra)
            if not found and isinstance(corruption, SpanCorruption):
                found = corruption.sentinel_problems(specials, lengths, extra)
            problems += [f"denoiser {denoiser.name}: {problem}" for problem in found]
        return list(dict.fromkeys(problems))
