"""What is learnt; one file a method, the same few functions each."""
