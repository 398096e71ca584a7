"""From a model and prompts to text: one jitted loop over a cache, for any model that has one."""

from lm.decoding.loop import Decoder as Decoder
from lm.decoding.loop import Generation as Generation
from lm.decoding.loop import State as State
from lm.decoding.prompts import Prompts as Prompts
from lm.decoding.prompts import bucket_length as bucket_length
from lm.decoding.prompts import pad_prompts as pad_prompts
from lm.decoding.sampling import Sampling as Sampling
from lm.decoding.text import TextStream as TextStream
