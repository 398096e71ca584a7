"""The objectives: one file each. This page is the list of what the room offers."""

from lm.objectives.base import Context as Context
from lm.objectives.base import Objective as Objective
from lm.objectives.base import Traits as Traits
from lm.objectives.base import Vocabulary as Vocabulary
from lm.objectives.causal import Causal as Causal
