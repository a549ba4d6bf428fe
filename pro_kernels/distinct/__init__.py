"""Run only the distinct tokens of a batch: common prefixes once, padding never."""
