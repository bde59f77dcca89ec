"""Evaluation of trained models: perplexity, RULER and lm-eval."""
