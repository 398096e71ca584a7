"""Models: from a batch to hidden states and logits. Contents page; nothing else here is public."""

from lm.models.attention import Chunked as Chunked
from lm.models.attention import Plain as Plain
from lm.models.decoder import Decoder as Decoder
from lm.models.layers import FanInInitializer as FanInInitializer
from lm.models.layers import LayerNorm as LayerNorm
from lm.models.layers import NormalInitializer as NormalInitializer
from lm.models.layers import Parameter as Parameter
from lm.models.layers import RMSNorm as RMSNorm
from lm.models.mlp import Mlp as Mlp
from lm.models.model import Model as Model
from lm.models.model import Output as Output
from lm.models.model import path_name as path_name
from lm.models.model import select_rows as select_rows
from lm.models.multihead import MultiHead as MultiHead
from lm.models.positions import Alibi as Alibi
from lm.models.positions import Bucketed as Bucketed
from lm.models.positions import Learned as Learned
from lm.models.positions import NoPositions as NoPositions
from lm.models.positions import Rotary as Rotary
from lm.models.positions import Sinusoidal as Sinusoidal
from lm.models.rope import LinearScaling as LinearScaling
from lm.models.rope import Llama3Scaling as Llama3Scaling
from lm.models.rope import NtkScaling as NtkScaling
from lm.models.rope import YarnScaling as YarnScaling
from lm.models.transformer import Layer as Layer
