"""Medical image segmentation that holds up at hospitals it was not trained on, and says so when it does not."""

__version__ = "0.1.0"
