"""Causal LMs and other people's trainers on the fused loss; a framework is imported when called."""
