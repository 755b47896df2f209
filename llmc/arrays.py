"""The type of arrays in signatures; docstrings give shapes and element types."""

import numpy as np

Array = np.ndarray
