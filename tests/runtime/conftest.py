"""The models of tests/validate."""

from tests.validate.conftest import _one_thread as _one_thread
from tests.validate.conftest import llama as llama
from tests.validate.conftest import tokens as tokens
