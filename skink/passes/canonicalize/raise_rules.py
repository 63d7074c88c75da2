"""All rules of `canonicalize` that raise idioms to ops, one file for each idiom. Exact.

The ops' references compute the same numbers up to rounding. At a node that several rules match, the first here is
applied.
"""

from skink.graph.pattern import Rule
from skink.passes.canonicalize.raise_attention import RULES as ATTENTION_RULES
from skink.passes.canonicalize.raise_layout import RULES as LAYOUT_RULES
from skink.passes.canonicalize.raise_linear import RULES as LINEAR_RULES
from skink.passes.canonicalize.raise_norms import RULES as NORM_RULES
from skink.passes.canonicalize.raise_rotary import RULES as ROTARY_RULES

RULES: tuple[Rule, ...] = (*NORM_RULES, *ROTARY_RULES, *ATTENTION_RULES, *LINEAR_RULES, *LAYOUT_RULES)
