"""Label assignment: balanced labels from logits."""
