"""What a run needs on N devices of a kind: memory, operations, communication, time, and whether it fits.

Analytic: shapes by `eval_shape`, one trace of the real train step, published figures of the hardware. Knows no device
that is here. Law: bytes of state and batch are exact; what the step adds to them is an estimate that a test holds to
within a factor of two of XLA's.
"""

import dataclasses
import math

from lm.experiment import Experiment
from lm.models import accounting
from lm.parallel.hardware import Hardware
from lm.scaling.cost import Collective, Cost
from lm.scaling.step import abstract_mesh, describe_step, host_bytes, local_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs, of each device unless it says otherwise.

    Attributes:
      experiment: the run.
      num_devices: how many devices.
      hardware: their kind.
      sizes: of the mesh axes.
      num_parameters: of the whole model.
      num_active_parameters: that one token meets.
      parameter_bytes: parameters, and their average if there is one.
      optimizer_bytes: the optimizer's state in the device's memory between steps.
      host_bytes: the optimizer's state of the device in its host's memory.
      gradient_bytes: gradients, which are float32 and divided as the optimizer's state is.
      batch_bytes: a step's batch.
      cost: the step's operations, memory traffic, peak of temporary memory and collectives.
      model_flops: operations of the model in a step, recomputation not counted, all devices together.
    """

    experiment: Experiment
    num_devices: int
    hardware: Hardware
    sizes: dict[str, int]
    num_parameters: int
    num_active_parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    host_bytes: int
    gradient_bytes: int
    batch_bytes: int
    cost: Cost
    model_flops: float

    @property
    def argument_bytes(self) -> int:
        """What is there between steps, and the batch; not what the host holds."""
        # The step counter and the key.
        return self.parameter_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def activation_bytes(self) -> int:
        """What the step needs for a time besides gradients: activations kept for the backward pass, logits, copies."""
        return max(self.cost.peak - self.gradient_bytes, 0)

    @property
    def update_bytes(self) -> int:
        """What the update needs for a time: gradients, and all state that the host holds, fetched before it begins."""
        return self.gradient_bytes + self.host_bytes

    @property
    def temporary_bytes(self) -> int:
        """What the step needs for a time, at its fullest: in the backward pass or in the update."""
        return max(self.cost.peak, self.update_bytes)

    @property
    def total_bytes(self) -> int:
        """Memory at its fullest."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether that is no more than the device has, a tenth of it left to the runtime and to fragmentation."""
        return self.total_bytes <= 0.9 * self.hardware.memory

    @property
    def update_fits(self) -> bool:
        """Whether the update alone would fit, however little the backward pass needs."""
        return self.argument_bytes + self.update_bytes <= 0.9 * self.hardware.memory

    @property
    def tokens(self) -> int:
        """Tokens of the main tower in a step."""
        return self.experiment.batch_size * self.experiment.data.lengths.tokens

    @property
    def compute_seconds(self) -> float:
        """Operations over peak speed."""
        return self.cost.flops / self.hardware.flops

    @property
    def traffic(self) -> float:
        """Bytes through memory; what is fetched from the host is written there once more, and read to be sent back."""
        return self.cost.traffic + 2 * self.host_bytes

    @property
    def memory_seconds(self) -> float:
        """Bytes through memory over its bandwidth."""
        return self.traffic / self.hardware.memory_bandwidth

    @property
    def host_seconds(self) -> float | None:
        """State of the host over the host's link, one way; None where the link's speed is not known."""
        if not self.host_bytes:
            return 0.0
        return None if self.hardware.host_link is None else self.host_bytes / self.hardware.host_link

    @property
    def communication_seconds(self) -> float:
        """Collectives over the bandwidth of their links."""
        return sum(self.seconds_of(message) for message in self.cost.messages())

    def seconds_of(self, message: Collective) -> float:
        """Returns how long the messages of one kind take."""
        return self.hardware.seconds(message.kind, message.axes, message.bytes, self.sizes)

    @property
    def best_seconds(self) -> float:
        """A step whose communication and memory traffic hide behind its products: max of these, and the host's link."""
        return max(self.roof_seconds, self.memory_seconds)

    @property
    def roof_seconds(self) -> float:
        """A step whose kernels keep attention scores and activations on the chip: max of products and communication.

        And of the host's link, of which both directions go at once.
        """
        return max(self.compute_seconds, self.communication_seconds, self.host_seconds or 0.0)

    @property
    def worst_seconds(self) -> float:
        """A step that hides nothing: their sum, the host's link there and back."""
        host = 2 * (self.host_seconds or 0.0)
        return self.compute_seconds + self.memory_seconds + self.communication_seconds + host

    def utilization(self, seconds: float) -> float:
        """Returns model FLOP/s over the devices' peak for a step of that length."""
        return self.model_flops / (seconds * self.num_devices * self.hardware.flops)


def make_plan(experiment: Experiment, num_devices: int, hardware: Hardware) -> Plan:
    """Plans a run; traces its train step once, in seconds and without a device.

    Raises:
      ConfigError: the mesh does not fit the number of devices, the model or the batch.
    """
    mesh = abstract_mesh(experiment.mesh, num_devices)
    step = describe_step(experiment, mesh)
    state, model = step.assembly.state, experiment.model
    parameters = step.assembly.model.parameters()
    lengths = experiment.data.lengths
    per_token = model.flops_per_token(lengths.tokens, lengths.encoder)
    own = local_bytes(state.params)
    on_host = host_bytes(state)
    return Plan(
        experiment=experiment,
        num_devices=num_devices,
        hardware=hardware,
        sizes={axis: size for axis, size in mesh.shape.items() if size > 1},
        num_parameters=accounting.num_parameters(parameters),
        num_active_parameters=accounting.num_active_parameters(parameters),
        parameter_bytes=own + local_bytes(state.average),
        optimizer_bytes=local_bytes(state.opt_state) - on_host,
        host_bytes=on_host,
        gradient_bytes=local_bytes(step.gradients),
        batch_bytes=local_bytes(step.batch),
        cost=step.count(),
        model_flops=per_token * experiment.batch_size * lengths.tokens,
    )


def halvings(number: int) -> list[int]:
    """Returns the powers of two, from 2 up, that divide a number."""
    return [2**n for n in range(1, int(math.log2(max(number, 1))) + 1) if number % 2**n == 0]
