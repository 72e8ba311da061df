"""tfrecord_tools/readers"""
