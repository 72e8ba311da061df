"""tfrecord_tools/writing"""
