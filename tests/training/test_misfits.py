"""A config that a sound checkpoint does not fit is refused in one sentence, and nothing on disk has changed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.config import ConfigError
from lm.evaluation.heldout import make_evaluate
from lm.experiment import CheckpointConfig, EvaluationConfig
from lm.optim import SGD, Adafactor, AdamW, AdamW8Bit, Average, Constant, Muon, OptimizerConfig, Skip
from lm.training.assembly import assemble
from lm.training.checkpoints import Checkpoints
from lm.training.logging import read_metrics
from lm.training.loop import train
from tests.training.experiments import TOKENIZER, tiny

EIGHT_BITS = OptimizerConfig(rule=AdamW8Bit(block=32), schedule=Constant(), learning_rate=1e-2)


def _zeros(experiment, step):
    """Returns the wanted state of a run, and one of zeros."""
    like = assemble(experiment, TOKENIZER).state
    rest = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like._replace(key=None))
    return like, rest._replace(key=jax.random.key(0), step=jnp.asarray(step, jnp.int32))


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


RULES = [AdamW8Bit(block=32), AdamW8Bit(block=256), Adafactor(momentum=0.9), SGD(), Muon()]


def test_what_every_rule_saves_fits_itself_and_no_other(tmp_path):
    states = []
    for step, rule in enumerate(RULES, 1):
        run = tiny(optimizer=dataclasses.replace(EIGHT_BITS, rule=rule, frozen=("tokens",), average=Average()))
        like, state = _zeros(dataclasses.replace(run, health=dataclasses.replace(run.health, spikes=Skip())), step)
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=100))
        checkpoints.save(state, {})
        checkpoints.wait()
        # The older ones, which would fit, are no way out, and the newest is not damaged.
        for older in states[-2:]:
            with pytest.raises(ConfigError, match=f"^the optimizer's state of step {step} has another shape"):
                checkpoints.restore(older)
        assert checkpoints.restore(like).step == step
        checkpoints.close()
        states.append(like)
    without = states[-1]._replace(average=None)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=100))
    assert checkpoints.restore(without).state.average is None
    with pytest.raises(ConfigError, match=r"step 5 has other figures than config\.health\.spikes makes"):
        checkpoints.restore(without._replace(spikes=None))
    with pytest.raises(ConfigError, match=r"step 5 lacks this model's parameter tower: config\.model cannot change"):
        checkpoints.restore(without._replace(params={**without.params, "tower": without.step}))
    checkpoints.close()
    assert _names(tmp_path / "checkpoints") == [str(step) for step in range(1, 6)]


class _DiedError(Exception):
    pass


def _die(_):
    def evaluate(*_):
        raise _DiedError

    return evaluate


def test_an_optimizer_of_another_shape_is_refused_and_the_run_goes_on(tmp_path, corpus):
    run = tiny(corpus, optimizer=EIGHT_BITS, num_steps=4, evaluation=EvaluationConfig(every=3, num_batches=1))
    with pytest.raises(_DiedError):
        train(run, str(tmp_path), _die)

    def written():
        return [(tmp_path / name).read_bytes() for name in ("config.json", "run.json", "metrics.jsonl")]

    before = written()
    assert _names(tmp_path / "checkpoints") == ["2"]
    for change, words in (
        ({"rule": AdamW()}, r"the optimizer's state of step 2 .* --config\.init_from="),
        ({"rule": AdamW8Bit(block=256)}, "the optimizer's state of step 2 has another shape"),
        ({"clip_norm": None}, "the optimizer's state of step 2 has another shape"),
        ({"average": Average()}, r"step 2 has no average of the parameters as config\.optimizer\.average"),
    ):
        other = dataclasses.replace(run, optimizer=dataclasses.replace(EIGHT_BITS, **change))
        with pytest.raises(ConfigError, match=f"^{words}") as caught:
            train(other, str(tmp_path), make_evaluate, force_config=True)
        assert "\n" not in str(caught.value)
        assert (_names(tmp_path / "checkpoints"), written()) == (["2"], before)
    assert train(run, str(tmp_path), make_evaluate)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"][-2:] == [
        3,
        4,
    ]
    # What does not change the state's shape is still forced, and only then written.
    other = dataclasses.replace(run, optimizer=dataclasses.replace(EIGHT_BITS, learning_rate=0.5))
    assert train(other, str(tmp_path), make_evaluate, force_config=True)
    assert (tmp_path / "config.json.1").read_bytes() == before[0] != written()[0]
