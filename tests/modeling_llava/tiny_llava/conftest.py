"""The small real run of the tests of training."""

from tests.modeling_llava.training.conftest import workspace

__all__ = ["workspace"]
