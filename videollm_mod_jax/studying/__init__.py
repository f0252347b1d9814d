"""The paper's study in miniature: its variants, how each is run, tables, figures, orderings."""
