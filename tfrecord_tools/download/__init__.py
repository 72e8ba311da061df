"""tfrecord_tools/download"""
