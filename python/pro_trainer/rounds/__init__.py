"""Rounds of sampling, scoring, training and evaluating: the parts that no other command has."""
