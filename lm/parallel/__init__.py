"""Where things live: meshes, logical axes and how the one maps to the other."""

from lm.parallel.axes import DEFAULT_RULES as DEFAULT_RULES
from lm.parallel.axes import LOGICAL_AXES as LOGICAL_AXES
from lm.parallel.axes import Rules as Rules
from lm.parallel.axes import constrain as constrain
from lm.parallel.axes import current as current
from lm.parallel.axes import is_placed as is_placed
from lm.parallel.axes import num_shards as num_shards
from lm.parallel.axes import shapes_only as shapes_only
from lm.parallel.axes import spec as spec
from lm.parallel.axes import use as use
from lm.parallel.collectives import Collective as Collective
from lm.parallel.collectives import Traffic as Traffic
from lm.parallel.collectives import count_collectives as count_collectives
from lm.parallel.collectives import list_collectives as list_collectives
from lm.parallel.mesh import MESH_AXES as MESH_AXES
from lm.parallel.mesh import MeshConfig as MeshConfig
from lm.parallel.mesh import build_mesh as build_mesh
from lm.parallel.shards import activation_spec as activation_spec
from lm.parallel.shards import by_shards as by_shards
from lm.parallel.shards import deal as deal
from lm.parallel.shards import gather_length as gather_length
from lm.parallel.shards import shift as shift
from lm.parallel.shards import to_heads as to_heads
from lm.parallel.shards import to_length as to_length
from lm.parallel.shards import undeal as undeal
from lm.parallel.shards import vary_like as vary_like
