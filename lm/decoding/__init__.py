"""From a model and prompts to text: one jitted loop over a cache, for any model that has one."""

from lm.decoding.arrangement import arrange as arrange
from lm.decoding.continuation import build_decoder as build_decoder
from lm.decoding.continuation import choose_frame as choose_frame
from lm.decoding.continuation import complete_texts as complete_texts
from lm.decoding.continuation import encode_prompts as encode_prompts
from lm.decoding.continuation import fit_max_tokens as fit_max_tokens
from lm.decoding.continuation import stream_text as stream_text
from lm.decoding.loop import Decoder as Decoder
from lm.decoding.loop import Generation as Generation
from lm.decoding.loop import State as State
from lm.decoding.prompts import DecodingError as DecodingError
from lm.decoding.prompts import Prompts as Prompts
from lm.decoding.prompts import bucket_length as bucket_length
from lm.decoding.prompts import pad_prompts as pad_prompts
from lm.decoding.sampling import Sampling as Sampling
from lm.decoding.text import TextStream as TextStream
