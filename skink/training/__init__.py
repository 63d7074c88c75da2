"""Recovery: a changed model learns from text and from the model it was; what trains, against what, and the loop."""
