"""Candidates: sampled, scored, ranked, and written so that a run can go on."""
