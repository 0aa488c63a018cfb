"""From tokens to a trained model: one step, the loop around it, and what makes the loop survive."""
