"""The fused loss in other people's code; each module imports its framework when it is called."""
