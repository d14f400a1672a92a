"""What layers compute in."""

from typing import Literal

# Floats; int8 with the activation grids of the model; int8 with activation scales found at run time.
Compute = Literal["float", "int8", "dynamic8"]
