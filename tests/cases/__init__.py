"""Every op's cases."""

from tests.cases import conv, guidance, scan

CASES = [*guidance.CASES, *scan.CASES, *scan.STEPS, *conv.CASES]
