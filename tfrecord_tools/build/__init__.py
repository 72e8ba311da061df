"""tfrecord_tools/build"""
