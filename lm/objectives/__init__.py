"""The objectives: one file each. This page is the list of what the room offers, and all a config may choose from."""

from typing import TypeAlias

from lm.objectives.bart import BART as BART
from lm.objectives.base import Context as Context
from lm.objectives.base import Layout as Layout
from lm.objectives.base import Objective as Objective
from lm.objectives.base import Traits as Traits
from lm.objectives.base import Vocabulary as Vocabulary
from lm.objectives.causal import Causal as Causal
from lm.objectives.deshuffle import Deshuffle as Deshuffle
from lm.objectives.drop import DropTokens as DropTokens
from lm.objectives.fim import FillInTheMiddle as FillInTheMiddle
from lm.objectives.glm import GLM as GLM
from lm.objectives.glm import SentenceBlanks as SentenceBlanks
from lm.objectives.glm import ShortBlanks as ShortBlanks
from lm.objectives.glm import SuffixBlank as SuffixBlank
from lm.objectives.masked import ALBERT as ALBERT
from lm.objectives.masked import BERT as BERT
from lm.objectives.masked import ROBERTA as ROBERTA
from lm.objectives.masked import MaskedLM as MaskedLM
from lm.objectives.masked_to_text import MaskedToText as MaskedToText
from lm.objectives.masking import NGrams as NGrams
from lm.objectives.masking import Replacement as Replacement
from lm.objectives.masking import Tokens as Tokens
from lm.objectives.mass import MASS as MASS
from lm.objectives.mixture import Component as Component
from lm.objectives.mixture import Mixture as Mixture
from lm.objectives.noise import SpanNoise as SpanNoise
from lm.objectives.noise import SuffixNoise as SuffixNoise
from lm.objectives.noise import TokenNoise as TokenNoise
from lm.objectives.pairs import NextSentence as NextSentence
from lm.objectives.pairs import SentenceOrder as SentenceOrder
from lm.objectives.pairs import SingleText as SingleText
from lm.objectives.prefix import PrefixLM as PrefixLM
from lm.objectives.replaced import ReplacedTokenDetection as ReplacedTokenDetection
from lm.objectives.span_corruption import SpanCorruption as SpanCorruption
from lm.objectives.text_to_text import TextToText as TextToText
from lm.objectives.ul2 import UL2 as UL2
from lm.objectives.ul2 import UL2_DENOISERS as UL2_DENOISERS
from lm.objectives.ul2 import UL2R_DENOISERS as UL2R_DENOISERS
from lm.objectives.ul2 import Denoiser as Denoiser

SingleObjective: TypeAlias = (
    Causal
    | PrefixLM
    | FillInTheMiddle
    | GLM
    | MaskedLM
    | ReplacedTokenDetection
    | SpanCorruption
    | UL2
    | BART
    | MASS
    | MaskedToText
    | DropTokens
    | Deshuffle
)
AnyObjective: TypeAlias = SingleObjective | Mixture
