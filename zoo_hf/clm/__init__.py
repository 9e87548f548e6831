"""A causal language model on a text: trained, tuned and scored as a command line says, and made to write."""
