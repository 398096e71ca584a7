"""Where things live: meshes, logical axes and how the one maps to the other."""

from lm.parallel.axes import DEFAULT_RULES as DEFAULT_RULES
from lm.parallel.axes import LOGICAL_AXES as LOGICAL_AXES
from lm.parallel.axes import Rules as Rules
from lm.parallel.axes import constrain as constrain
from lm.parallel.axes import current as current
from lm.parallel.axes import shapes_only as shapes_only
from lm.parallel.axes import spec as spec
from lm.parallel.axes import use as use
from lm.parallel.host import keep_freed_memory as keep_freed_memory
from lm.parallel.mesh import MESH_AXES as MESH_AXES
from lm.parallel.mesh import MeshConfig as MeshConfig
from lm.parallel.mesh import build_mesh as build_mesh
