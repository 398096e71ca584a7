"""A weighted mixture of any objectives, one drawn for each document.

Owns the draw and the ids of the components. Knows an objective by its protocol only. Law: the component of a
document depends on (seed, epoch, index) alone, and what it makes is what it would make by itself.

Causal (weight 3) and prefix LM (weight 1), names "lm" and "prefix": a document that draws the second has

    components [1, 1, ..., 1]   traits.component_names ("lm", "prefix")
"""

import dataclasses

import numpy as np

import lm.objectives
from lm.batch import DTYPES, Document, Example, Lengths, SpecialTokens
from lm.objectives.base import CHOICE, Context, Frame, Traits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One objective of a mixture.

    Attributes:
      name: its name in logs, unique in the mixture.
      objective: any objective but a mixture.
      weight: relative share of the documents.
    """

    name: str
    objective: "lm.objectives.SingleObjective"
    weight: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its ids: its own, or one for each component that the objective itself has."""
        inner = self.objective.traits.component_names
        return tuple(f"{self.name}/{name}" for name in inner) or (self.name,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Gives each document to one of several objectives, by weight.

    Shares are of documents; the shares of examples and of loss tokens follow from what each objective makes of
    one, and are logged by component. An optional field that a component does not set is zero in its examples.

    Attributes:
      components: the objectives with their names and weights.
    """

    components: tuple[Component, ...]

    @property
    def traits(self) -> Traits:
        """What all the components allow, and what any of them needs."""
        inner = [component.objective.traits for component in self.components]
        frames = tuple((c.name, t.frame) for c, t in zip(self.components, inner, strict=True) if t.autoregressive)
        return Traits(
            layouts=frozenset.intersection(*(t.layouts for t in inner)) if inner else frozenset(),
            bidirectional=any(t.bidirectional for t in inner),
            autoregressive=all(t.autoregressive for t in inner),
            originals=all(t.originals for t in inner),
            needs_generator=any(t.needs_generator for t in inner),
            fields=frozenset({"components"}).union(*(t.fields for t in inner)),
            num_labels=max((t.num_labels for t in inner), default=0),
            label_rule=next((t.label_rule for t in inner if t.label_rule), ""),
            frame=frames[0][1] if frames else Frame(),
            frames=frames,
            component_names=tuple(name for component in self.components for name in component.names),
        )

    def choose(self, context: Context) -> int:
        """Returns which component the document of `context` is given to."""
        shares = np.array([component.weight for component in self.components])
        return int(context.rng(CHOICE).choice(len(shares), p=shares / shares.sum()))

    def examples(self, document: Document, context: Context) -> list[Example]:
        """Returns the examples that the drawn component makes of the document, with its id."""
        chosen = self.choose(context)
        first_id = sum(len(component.names) for component in self.components[:chosen])
        fields = self.traits.fields
        examples = self.components[chosen].objective.examples(document, context)
        return [complete(example, first_id, fields) for example in examples]

    def problems(self, specials: SpecialTokens, lengths: Lengths) -> list[str]:
        """Returns what cannot work, with the name of the component that cannot."""
        problems = []
        names = [component.name for component in self.components]
        if len(set(names)) < len(names):
            problems.append(f"components need names of their own; they are {names}")
        weights = [component.weight for component in self.components]
        if not weights or min(weights) < 0 or sum(weights) == 0:
            problems.append("components needs at least one entry, weights of 0 or more, and one above 0")
        if weights and not self.traits.layouts:
            shown = ", ".join(f"{c.name}: {sorted(c.objective.traits.layouts)}" for c in self.components)
            problems.append(f"the components have no layout in common ({shown}): no model can train on all of them")
        elif lengths.encoder is not None and weights and "encoder_decoder" not in self.traits.layouts:
            problems.append("lengths.encoder is set, but not every component makes examples for two stacks: unset it")
        problems += self._label_problems()
        for component in self.components:
            if isinstance(component.objective, Mixture):
                problems.append(f"component {component.name} is a mixture: list its components here instead")
                continue
            found = component.objective.problems(specials, lengths)
            problems += [f"component {component.name}: {problem}" for problem in found]
        return problems

    def _label_problems(self) -> list[str]:
        """What a single pooled head cannot learn: different questions answered by the same classes."""
        rules = {c.name: rule for c in self.components if (rule := c.objective.traits.label_rule)}
        if len(set(rules.values())) < 2:
            return []
        shown = ", ".join(f"{name}: {rule}" for name, rule in rules.items())
        return [f"the components label pairs by different rules ({shown}), and a model has one pooled head: keep one"]


def complete(example: Example, first_id: int, fields: frozenset[str]) -> Example:
    """Returns the example with its component ids counted from `first_id`, and zeros for the `fields` that it lacks."""
    length = len(example.inputs)
    missing = {name: np.zeros(length, DTYPES[name]) for name in fields if getattr(example, name) is None}
    inner = np.zeros(length, np.int32) if example.components is None else example.components
    missing["components"] = inner + np.int32(first_id)
    return dataclasses.replace(example, **missing)
