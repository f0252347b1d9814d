"""TensorFlow Datasets builders that write ArrayRecord without TensorFlow."""
