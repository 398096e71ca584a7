"""Where things live: meshes, logical axes and how the one maps to the other."""

from lm.parallel.axes import DEFAULT_RULES as DEFAULT_RULES
from lm.parallel.axes import LOGICAL_AXES as LOGICAL_AXES
from lm.parallel.axes import Rules as Rules
from lm.parallel.axes import constrain as constrain
from lm.parallel.axes import current as current
from lm.parallel.axes import inside as inside
from lm.parallel.axes import is_divided as is_divided
from lm.parallel.axes import shapes_only as shapes_only
from lm.parallel.axes import spec as spec
from lm.parallel.axes import use as use
from lm.parallel.manual import by_device as by_device
from lm.parallel.manual import carriers as carriers
from lm.parallel.manual import gather_weight as gather_weight
from lm.parallel.manual import own_part as own_part
from lm.parallel.manual import place_rows as place_rows
from lm.parallel.mesh import MESH_AXES as MESH_AXES
from lm.parallel.mesh import MeshConfig as MeshConfig
from lm.parallel.mesh import Pipeline as Pipeline
from lm.parallel.mesh import build_mesh as build_mesh
from lm.parallel.pipeline import num_pieces as num_pieces
from lm.parallel.pipeline import run_pipeline as run_pipeline
from lm.parallel.pipeline import uneven as uneven
from lm.parallel.sharding import Sharding as Sharding
