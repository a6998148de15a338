"""LoRA and QLoRA as a pure transform of the parameter pytree."""
