"""Every op's cases."""

from tests.cases import guidance

CASES = [*guidance.CASES]
