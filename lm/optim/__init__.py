"""Optimizers and schedules: which step to take, given a gradient."""

from lm.optim.average import Average as Average
from lm.optim.optimizer import OptimizerConfig as OptimizerConfig
from lm.optim.optimizer import build_optimizer as build_optimizer
from lm.optim.optimizer import norm as norm
from lm.optim.optimizer import parameter_paths as parameter_paths
from lm.optim.optimizer import square_sums as square_sums
from lm.optim.roles import Role as Role
from lm.optim.roles import role_of as role_of
from lm.optim.roles import roles_of as roles_of
from lm.optim.rules import SGD as SGD
from lm.optim.rules import Adafactor as Adafactor
from lm.optim.rules import AdamW as AdamW
from lm.optim.rules import AdamW8Bit as AdamW8Bit
from lm.optim.rules import Lion as Lion
from lm.optim.rules import Muon as Muon
from lm.optim.schedules import Constant as Constant
from lm.optim.schedules import Cosine as Cosine
from lm.optim.schedules import InverseSquareRoot as InverseSquareRoot
from lm.optim.schedules import Linear as Linear
from lm.optim.schedules import WarmupStableDecay as WarmupStableDecay
from lm.optim.spikes import Bounds as Bounds
from lm.optim.spikes import RollBack as RollBack
from lm.optim.spikes import Skip as Skip
from lm.optim.state_axes import state_axes as state_axes
