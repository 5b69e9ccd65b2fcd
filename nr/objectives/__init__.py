"""Pure losses and training targets, each written from its paper's equation."""
