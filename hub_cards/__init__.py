"""Templates of the cards of models, adapters, datasets and Spaces, and facts of published models."""
