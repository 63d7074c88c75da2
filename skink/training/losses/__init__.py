"""What is learnt: losses against text and against a teacher."""
