"""Small runs that released versions left behind, which every later version must load and continue."""
