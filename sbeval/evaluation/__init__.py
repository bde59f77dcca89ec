"""What a trained model is evaluated by."""
