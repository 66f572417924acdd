"""What is wrong with a set of images: copies, odd ones, wrong classes, copies across train and test."""
