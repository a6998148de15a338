"""The loss, the optimizer, the step and the loop around them."""
