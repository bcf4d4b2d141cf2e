"""Which teacher teaches which sample: ambiguity, assignment, carrying predictions across label spaces. Pure torch."""
