"""Every op's cases."""

from tests.cases import adaln, attention, conv, guidance, patch, routing, scan

CASES = [
    *guidance.CASES,
    *scan.CASES,
    *scan.STEPS,
    *conv.CASES,
    *attention.CASES,
    *adaln.CASES,
    *routing.CASES,
    *patch.CASES,
]
